"""Evaluate compression: what it costs in quality, beside what it saves."""
