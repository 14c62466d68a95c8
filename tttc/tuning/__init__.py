"""Schedules found by measuring: searched for, remembered, chosen."""
