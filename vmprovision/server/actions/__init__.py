"""Change the store as clients ask.

Each function is one transaction, and starts no work itself: the workers do what the rows
then say. The API and the pages call these functions.
"""
