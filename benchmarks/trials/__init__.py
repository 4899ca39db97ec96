"""The trials of reliability.py: real runs that are killed, signalled, starved of disk, and damaged."""
