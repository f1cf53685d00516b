"""Host emulation of Metal threadgroups: runs kernel bodies with the host's C++ compiler."""
