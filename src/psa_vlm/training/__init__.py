"""The two stages of training, on `transformers.Trainer`, resumable after any crash."""
