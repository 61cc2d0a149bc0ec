"""The command line: mount, umount, status, rules.  Every failure is one line on stderr and a non-zero exit code."""
