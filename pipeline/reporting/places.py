"""Where caches lie: folders, or URLs, which may carry credentials that no report must show. Costs nothing."""

import re

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+", re.IGNORECASE)
_SECRET = re.compile(r"(?<=//)[^/@\s]*@|\?\S*")


def is_remote(place: object) -> bool:
    """Whether a place is a URL."""
    return isinstance(place, str) and _URL.fullmatch(place) is not None


def shown(place: object) -> str:
    """A place as text; of a URL without user, password and query."""
    return _SECRET.sub("", place) if isinstance(place, str) and is_remote(place) else str(place)
