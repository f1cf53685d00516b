"""Stage two, room by room: where targets come from, the student, the loop, its log."""
