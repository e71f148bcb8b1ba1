"""The parity lab, against planted mistakes and clean pairs."""
