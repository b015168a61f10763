//! Splits a list of attachments over as many packets as it needs.

use super::{Attachment, Request, packet};

/// The packets of a [`Request::Gc`]: it is the last one, and there are as many [`Request::GcPart`] before it as need be.
pub(super) fn requests(valid: &[Attachment]) -> Vec<Request> {
    let parts = packet::split(valid.iter().map(|attachment| (attachment.clone(), packet::size(attachment))));
    let last = parts.len() - 1;
    let request = |(i, valid)| if i < last { Request::GcPart { valid } } else { Request::Gc { valid } };
    parts.into_iter().enumerate().map(request).collect()
}
