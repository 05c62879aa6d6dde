"""The inference pool: queues, batches and instances, as plain synchronous code.

Nothing here knows asyncio, HTTP or a clock of its own. Entries come in through an `Inbox`, results
leave through an `Outbox` (`inferpool.pool.ports`), so that the pool may live in a thread beside the web
server or in a process of its own.
"""
