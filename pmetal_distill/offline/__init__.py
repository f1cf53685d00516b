"""Stage one inside the library: capture, sketch, writer, reader."""
