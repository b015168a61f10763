//! Splits a list of attachments into as many packets as necessary.

use super::{Attachment, Request, packet};

/// The packets of a [`Request::Gc`], which is the last one; as many [`Request::GcPart`] as necessary precede it.
pub(super) fn requests(valid: &[Attachment]) -> Vec<Request> {
    let parts = packet::split(valid.iter().map(|attachment| (attachment.clone(), packet::size(attachment))));
    let last = parts.len() - 1;
    let request = |(i, valid)| if i < last { Request::GcPart { valid } } else { Request::Gc { valid } };
    parts.into_iter().enumerate().map(request).collect()
}
