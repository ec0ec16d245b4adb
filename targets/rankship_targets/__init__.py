"""Device stage of Rankship: transports, the target-side agent and measuring sessions."""
