"""Requests that cost a server more than they cost their sender, thrown at it beside good requests."""
