"""How a training worker's process gets its memory."""

MEMORY_SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Environment variables of the process, which glibc reads when it starts.

A step allocates and frees the same gigabytes as the one before. Left alone, glibc gives large pieces back to the
kernel each time and gets them again as untouched pages of 4 kB: of a step's time a tenth and more. With these it keeps
them, in pages of 2 MB where the kernel has them. One arena, as an arena of a thread (Ray Train's) cannot hold more than
64 MB.
"""
