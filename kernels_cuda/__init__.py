"""CUDA C++ kernels, compiled at first run by NVRTC. Nothing of tinychat's other rooms is imported here."""
