"""The RAG trainers: rows of questions and answers, LSR for the retriever, RALT for the generator."""

from __future__ import annotations
