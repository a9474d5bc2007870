"""What is known of devices before any is started: plugins, versions, known faults. Pure."""
