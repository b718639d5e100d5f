"""One file a published system: `ls` is the table of contents."""
