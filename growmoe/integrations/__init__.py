"""The organizer in other people's training loops: one module for each, imported when needed.

    growmoe.integrations.huggingface       OrganizerCallback for transformers.Trainer
    growmoe.integrations.torch_lightning   OrganizerCallback for Lightning

Under Accelerate there is nothing to add: `growmoe.Organizer(model, optimizer)` takes what
`accelerator.prepare` returned.
"""
