"""Triton kernels: operations of the model that read and write the memory of a GPU once instead of many times.

Each replaces a few lines of torch beside its caller. Those lines run everywhere else, and are its oracle.
"""
