"""Configs of other programs, turned into our options: one table a program, one module a table."""
