"""Which parts tell a clean run from a corrupted one."""
