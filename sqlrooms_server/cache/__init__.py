"""Complete results, remembered in memory and on disk. Knows nothing of queries, tables or sockets.

What makes a result valid is the caller's: an entry carries a token that the cache never looks at.
"""

from sqlrooms_server.cache.entries import Entry, Overflow, Spool
from sqlrooms_server.cache.fingerprint import fingerprint
from sqlrooms_server.cache.results import Key, ResultCache

__all__ = ["Entry", "Key", "Overflow", "ResultCache", "Spool", "fingerprint"]
