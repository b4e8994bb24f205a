"""Which components make a clean run differ from a corrupted one."""
