"""The weights workbench: inspect, convert, diff, merge, extract; one file each."""
