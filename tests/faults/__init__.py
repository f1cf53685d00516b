"""Caches under kills, full and failing disks, damage and hostile files; the long form is marked `faults`."""
