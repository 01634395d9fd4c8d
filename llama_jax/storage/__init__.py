"""Files on disk and in object storage: written whole, owned by one process, and verified by checksums."""
