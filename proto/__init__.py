"""The words all packages share: events in, scores out, errors, the gRPC contract."""
