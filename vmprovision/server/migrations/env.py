"""Run the migrations on the connection that the store gives; Alembic loads this file."""

from alembic import context

from vmprovision.server.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
