"""The way to a phone: adb."""
