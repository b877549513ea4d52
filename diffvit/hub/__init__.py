"""The Hugging Face hub: the account, the client, and how its requests are bounded."""
