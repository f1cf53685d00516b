"""What a label is: the id of the next token, or this where there is none."""

IGNORE_INDEX = -100
