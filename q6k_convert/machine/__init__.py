"""What this machine can do: the doctor, and building the C++ library of the operations."""
