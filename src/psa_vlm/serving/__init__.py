"""The service: an OpenAI-compatible door to a run, with a verdict, a policy and an audit trail."""
