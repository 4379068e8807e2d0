"""The ``*.cu`` files of the folder above, compiled for the CPU by g++."""
