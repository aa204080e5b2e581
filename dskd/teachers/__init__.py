"""What gives a student its signal: live, cached, routed and self teachers."""
