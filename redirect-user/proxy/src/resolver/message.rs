//! Parses DNS messages as far as the resolver needs it. Queries and answers are passed on byte by byte: re-encoding
//! would lose whatever the parser does not know.

use hickory_proto::op::{Edns, Header, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::RecordType;
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder};

/// The length of a message's header.
const HEADER: usize = 12;

/// The UDP payload size that the resolver's own answers advertise.
const OWN_LIMIT: u16 = 1232;

/// The result of parsing an incoming message.
#[derive(Debug)]
pub(super) enum Received {
    Question(Question),
    /// It can't be parsed, or must not be forwarded.
    Rejected {
        answer: Vec<u8>,
        code: ResponseCode,
    },
    /// No client waits for an answer, or the message can't be attributed to a query.
    Unanswerable,
}

/// A query that can be forwarded.
#[derive(Debug)]
pub(super) struct Question {
    bytes: Vec<u8>,
    header: Header,
    query: Query,
    /// The maximum length of an answer over UDP.
    limit: u16,
    edns: bool,
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    pub(super) code: ResponseCode,
    pub(super) truncated: bool,
}

impl Answer {
    /// Whether another server may have a better answer.
    pub(super) fn is_poor(&self) -> bool {
        matches!(self.code, ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp)
    }
}

/// Parses an incoming message.
pub(super) fn receive(bytes: Vec<u8>) -> Received {
    let Ok(header) = Header::read(&mut BinDecoder::new(&bytes)) else { return Received::Unanswerable };
    if header.message_type == MessageType::Response {
        return Received::Unanswerable;
    }
    let reject = |code| Received::Rejected { answer: encode(&error(&header, code)), code };
    if header.op_code != OpCode::Query {
        return reject(ResponseCode::NotImp);
    }
    let Ok(message) = Message::from_vec(&bytes) else { return reject(ResponseCode::FormErr) };
    let [query] = &message.queries[..] else { return reject(ResponseCode::FormErr) };
    // A zone transfer takes many messages.
    if matches!(query.query_type(), RecordType::AXFR | RecordType::IXFR) {
        return reject(ResponseCode::NotImp);
    }
    Received::Question(Question {
        header,
        query: query.clone(),
        limit: message.max_payload(),
        edns: message.edns.is_some(),
        bytes,
    })
}

impl Question {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn name(&self) -> String {
        self.query.name().to_string()
    }

    pub(super) fn kind(&self) -> String {
        self.query.query_type().to_string()
    }

    /// An error answer of the resolver itself.
    pub(super) fn failure(&self, code: ResponseCode) -> Vec<u8> {
        let mut message = error(&self.header, code);
        message.add_query(self.query.clone());
        if self.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(OWN_LIMIT);
            message.set_edns(edns);
        }
        encode(&message)
    }

    /// Parses a message as the answer to this query, if it is one.
    pub(super) fn answered_by(&self, bytes: Vec<u8>) -> Option<Answer> {
        let mut decoder = BinDecoder::new(&bytes);
        let header = Header::read(&mut decoder).ok()?;
        let queries = Message::read_queries(&mut decoder, header.counts.queries.into()).ok()?;
        let code = header.response_code;
        let same = match &queries[..] {
            // Servers that can't parse a query need not repeat it.
            [] => code != ResponseCode::NoError,
            [query] => *query == self.query,
            _ => false,
        };
        let answers = header.message_type == MessageType::Response && header.id == self.header.id && same;
        let truncated = header.truncation;
        answers.then_some(Answer { bytes, code, truncated })
    }

    /// The answer for a client on UDP: without its records if it is too long, so that the client retries over TCP.
    pub(super) fn fit(&self, mut answer: Vec<u8>) -> Vec<u8> {
        const FLAGS: usize = 2;
        const TRUNCATED: u8 = 0b10;
        const RECORD_COUNTS: std::ops::Range<usize> = 6..HEADER;
        if answer.len() <= self.limit.into() {
            return answer;
        }
        let Some(end) = end_of_queries(&answer) else { return self.failure(ResponseCode::ServFail) };
        answer.truncate(end);
        if let Some(flags) = answer.get_mut(FLAGS) {
            *flags |= TRUNCATED;
        }
        if let Some(counts) = answer.get_mut(RECORD_COUNTS) {
            counts.fill(0);
        }
        answer
    }
}

fn end_of_queries(bytes: &[u8]) -> Option<usize> {
    let mut decoder = BinDecoder::new(bytes);
    let header = Header::read(&mut decoder).ok()?;
    Message::read_queries(&mut decoder, header.counts.queries.into()).ok()?;
    Some(decoder.index())
}

fn error(question: &Header, code: ResponseCode) -> Message {
    let mut message = Message::error_msg(question.id, question.op_code, code);
    message.metadata.recursion_desired = question.recursion_desired;
    message.metadata.recursion_available = true;
    message
}

fn encode(message: &Message) -> Vec<u8> {
    // A message that was just parsed, or is empty, can be encoded.
    message.to_vec().unwrap_or_default()
}

#[cfg(test)]
mod tests;
