"""The tables of the store, in SQLAlchemy Core.

Times are seconds since 1970. A VM's row is also an entry of the queue: ``due_at`` says
when it needs work, and ``lease_owner`` which server works on it until ``lease_until``.
The migrations in ``migrations/versions`` make the same tables; a test compares both.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite counts up only in a column of exactly this type.
_COUNTER = BigInteger().with_variant(Integer(), "sqlite")


def _queue_columns() -> list[Column[object]]:
    """Return the columns that let servers take turns at a row."""
    return [
        Column("due_at", Double, nullable=False),
        Column("attempts", Integer, nullable=False, default=0),
        Column("lease_owner", String(64)),
        Column("lease_until", Double, nullable=False, default=0.0),
        Column("created_at", Double, nullable=False),
        Column("updated_at", Double, nullable=False),
    ]


installation = Table(
    "installation",
    metadata,
    Column("id", String(36), primary_key=True),
)

templates = Table(
    "templates",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("vcpu", Integer, nullable=False),
    Column("mem_mib", Integer, nullable=False),
    Column("rootfs_path", Text, nullable=False),
    Column("image_format", String(8)),
    Column("agent", String(8), nullable=False),  # required, optional
    Column("is_hidden", Boolean, nullable=False, default=False),  # of one VM made by rootfs_path
    Column("state", String(16), nullable=False),  # preparing, ready, failed, deleting
    Column("guest", JSON, nullable=False),
    Column("boot", JSON),
    Column("has_agent", Boolean, nullable=False, default=False),
    Column("sha256", String(64)),
    Column("error", JSON),
    *_queue_columns(),
)

vms = Table(
    "vms",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", String(128), nullable=False, unique=True),
    Column("template_id", String(36), ForeignKey("templates.id"), nullable=False),
    Column("vcpu", Integer, nullable=False),
    Column("mem_mib", Integer, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("host", Text),
    Column("phase", String(16), nullable=False),
    Column("phase_at", Double, nullable=False),
    Column("wanted", String(16), nullable=False),  # running, stopped, paused, deleted
    Column("domain_state", String(16), nullable=False, default="absent"),
    Column("has_failed", Boolean, nullable=False, default=False),
    Column("error", JSON),
    Column("evidence", JSON, nullable=False),
    Column("guest_ip", String(64)),
    Column("reported_at", Double),
    Column("answered_at", Double),
    Column("deadline_at", Double),
    Column("stop_at", Double),  # when a guest that does not shut down is switched off
    Column("token", String(64)),  # until it is in the guest
    Column("token_hash", String(64), nullable=False),
    *_queue_columns(),
)

events = Table(
    "events",
    metadata,
    Column("id", _COUNTER, primary_key=True, autoincrement=True),
    Column("vm_id", String(36), nullable=False),
    Column("at", Double, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("message", Text, nullable=False),
    Index(None, "vm_id", "id"),
)

samples = Table(
    "samples",
    metadata,
    Column("vm_id", String(36), primary_key=True),
    Column("at", Double, primary_key=True),
    Column("cpu_usage_percent", Double),
    Column("memory_usage_percent", Double),
    Column("memory_used_kb", BigInteger),
    Column("memory_total_kb", BigInteger),
    Column("load_average", Double),
    Column("process_count", BigInteger),
    Column("uptime_seconds", BigInteger),
)

replies = Table(
    "replies",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("body", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
)

Index(None, templates.c.due_at)
Index(None, vms.c.due_at)
Index(None, samples.c.at)
