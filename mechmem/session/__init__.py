"""The session: models and example sets, and everything that may be asked of them."""

from mechmem.session.session import Session as Session
from mechmem.session.session import SourcePrefix as SourcePrefix
