"""The contract between workers, daemons and operators. No I/O, no torch; everyone imports it."""
