"""These kernels under the names of other libraries, for code that is written for those."""
