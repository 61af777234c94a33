"""A change that is not meant to change numbers leaves this curve as it is, to the bit.

The curve was taken in fp32 on one thread. The order in which a matrix product is summed depends on the kernels a CPU
gets, so on another kind of CPU it may differ in the last bits: there the bound is 1e-5, relative, and on the kind the
curve was taken on it is 0. A change of initialisation, order, schedule, optimizer or loss moves it by far more.
"""
