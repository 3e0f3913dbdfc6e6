"""Change the store at a client's request.

Each function is one transaction, and starts no work itself. The workers do what the
rows then require. The API and the pages call these functions.
"""
