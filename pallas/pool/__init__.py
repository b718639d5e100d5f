"""Means of blocks of tokens, alone or beside what another kernel computes."""
