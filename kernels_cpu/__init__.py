"""C++ SIMD kernels, thread pool and program executor. Nothing of tinychat's other rooms is imported here."""
