//! Reassembles a list of attachments that came in several packets.

use super::{Attachment, Error, ErrorKind, MAX_ATTACHMENTS, Request};

/// A list that is still being received.
#[derive(Debug, Default)]
pub(super) struct Parts(Vec<Attachment>);

impl Parts {
    /// Adds the request of the next packet. Returns the whole request once it is complete.
    pub(super) fn take(&mut self, request: Request) -> Result<Option<Request>, Error> {
        match request {
            Request::GcPart { valid } => self.extend(valid).map(|()| None),
            Request::Gc { valid } => {
                self.extend(valid)?;
                Ok(Some(Request::Gc { valid: std::mem::take(&mut self.0) }))
            }
            request if self.0.is_empty() => Ok(Some(request)),
            _ => Err(Error::new(ErrorKind::Malformed, "another request came in the middle of a list")),
        }
    }

    fn extend(&mut self, valid: Vec<Attachment>) -> Result<(), Error> {
        self.0.extend(valid);
        if self.0.len() <= MAX_ATTACHMENTS {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Malformed, format!("the list has more than {MAX_ATTACHMENTS} attachments")))
    }
}

#[cfg(test)]
mod tests {
    use super::super::gc::requests;
    use super::super::packet;
    use super::*;

    fn attachments(count: usize) -> Vec<Attachment> {
        let attachment = |i| Attachment { container_id: format!("{i:064x}"), interface: "eth0".into() };
        (0..count).map(attachment).collect()
    }

    #[test]
    fn lists_of_any_length_are_split_into_packets_that_fit_and_put_together_again() {
        for count in [0, 1, 900, 5_000, MAX_ATTACHMENTS] {
            let valid = attachments(count);
            let requests = requests(&valid);
            let mut parts = Parts::default();
            let mut whole = Vec::new();
            for request in requests {
                let packet = packet::encode(&request).unwrap();
                whole.extend(parts.take(packet::decode(&packet).unwrap()).unwrap());
            }
            assert_eq!(whole, [Request::Gc { valid }], "{count}");
        }
    }

    #[test]
    fn endless_lists_are_refused() {
        let mut parts = Parts::default();
        let part = || Request::GcPart { valid: attachments(MAX_ATTACHMENTS / 2 + 1) };
        assert_eq!(parts.take(part()), Ok(None));
        assert_eq!(parts.take(part()).unwrap_err().kind, ErrorKind::Malformed);
    }

    #[test]
    fn nothing_else_may_come_in_the_middle_of_a_list() {
        let mut parts = Parts::default();
        assert_eq!(parts.take(Request::GcPart { valid: attachments(1) }), Ok(None));
        assert_eq!(parts.take(Request::Ready).unwrap_err().kind, ErrorKind::Malformed);
    }
}
