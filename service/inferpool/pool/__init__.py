"""The inference pool: queues, batches and instances, as plain synchronous code.

Nothing here imports asyncio or HTTP, or reads a clock that was not passed in. Entries come in through an
`Inbox`, results leave through an `Outbox` (`inferpool.pool.ports`). A pool can therefore run in a thread
beside the web server, or in a process of its own.
"""
