//! What the resolver has to know of DNS messages. Questions and answers are passed on byte by byte: a parser that writes
//! them anew would lose what it does not know.

use hickory_proto::op::{Edns, Header, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::RecordType;
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder};

/// Every message starts with a header of this length.
const HEADER: usize = 12;

/// What the resolver's own answers say about the datagrams that it takes.
const OWN_LIMIT: u16 = 1232;

/// What became of a message that came in.
#[derive(Debug)]
pub(super) enum Received {
    Question(Question),
    /// It is not understood, or nothing that is passed on.
    Rejected {
        answer: Vec<u8>,
        code: ResponseCode,
    },
    /// Nobody waits for an answer to it, or nobody knows to which question that would be.
    Unanswerable,
}

/// A question that can be passed on.
#[derive(Debug)]
pub(super) struct Question {
    bytes: Vec<u8>,
    header: Header,
    query: Query,
    /// How long an answer by UDP may be.
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
    /// Whether another server may know better.
    pub(super) fn is_poor(&self) -> bool {
        matches!(self.code, ResponseCode::ServFail | ResponseCode::Refused | ResponseCode::NotImp)
    }
}

/// Looks at a message that came in.
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
    // A zone takes many messages.
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

    /// The resolver's own answer, an error.
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

    /// Takes a message for the answer to this question if it is one.
    pub(super) fn answered_by(&self, bytes: Vec<u8>) -> Option<Answer> {
        let mut decoder = BinDecoder::new(&bytes);
        let header = Header::read(&mut decoder).ok()?;
        let queries = Message::read_queries(&mut decoder, header.counts.queries.into()).ok()?;
        let code = header.response_code;
        let same = match &queries[..] {
            // Servers that do not understand a question need not repeat it.
            [] => code != ResponseCode::NoError,
            [query] => *query == self.query,
            _ => false,
        };
        let answers = header.message_type == MessageType::Response && header.id == self.header.id && same;
        let truncated = header.truncation;
        answers.then_some(Answer { bytes, code, truncated })
    }

    /// The answer as the asker can take it by UDP: if it is too long, without its records, so that it is asked for by
    /// TCP.
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
    // What was just parsed, or is empty, can be written.
    message.to_vec().unwrap_or_default()
}

#[cfg(test)]
mod tests;
