use hickory_proto::op::Edns;
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::{Name, RData, Record};
use proptest::prelude::*;

use super::*;

const ID: u16 = 0x1234;

fn query(kind: RecordType, payload: Option<u16>) -> Message {
    let mut message = Message::new(ID, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii("www.Example.test.").unwrap(), kind));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.set_edns(edns);
    }
    message
}

fn question(message: &Message) -> Question {
    match receive(message.to_vec().unwrap()) {
        Received::Question(question) => question,
        other => panic!("{other:?}"),
    }
}

fn rejected(bytes: Vec<u8>) -> (Message, ResponseCode) {
    match receive(bytes) {
        Received::Rejected { answer, code } => (Message::from_vec(&answer).unwrap(), code),
        other => panic!("{other:?}"),
    }
}

/// An answer with a record of this many bytes.
fn answer(to: &Message, bytes: usize) -> Message {
    let mut answer = to.clone().into_response();
    let text = vec!["x".repeat(200); bytes.div_ceil(200)];
    let name = to.queries[0].name().clone();
    answer.add_answer(Record::from_rdata(name, 60, RData::TXT(TXT::new(text))));
    answer
}

#[test]
fn questions_are_passed_on_as_they_are() {
    for (payload, limit) in [(None, 512), (Some(100), 512), (Some(1232), 1232), (Some(65535), 65535)] {
        let message = query(RecordType::AAAA, payload);
        let question = question(&message);
        assert_eq!(question.bytes(), message.to_vec().unwrap());
        assert_eq!((question.name().as_str(), question.kind().as_str()), ("www.Example.test.", "AAAA"));
        assert_eq!(question.limit, limit, "{payload:?}");
    }
}

#[test]
fn what_is_no_question_is_not_answered() {
    assert!(matches!(receive(Vec::new()), Received::Unanswerable));
    assert!(matches!(receive(vec![0; HEADER - 1]), Received::Unanswerable));
    // Answering answers is how two servers keep each other busy forever.
    let response = query(RecordType::A, None).into_response();
    assert!(matches!(receive(response.to_vec().unwrap()), Received::Unanswerable));
}

#[test]
fn what_cannot_be_passed_on_is_answered_with_an_error() {
    let valid = query(RecordType::A, None);
    let mut two = valid.clone();
    two.add_query(valid.queries[0].clone());
    let mut update = valid.clone();
    update.metadata.op_code = OpCode::Update;
    let none = Message::new(ID, MessageType::Query, OpCode::Query);
    let mut cut = valid.to_vec().unwrap();
    cut.pop();
    let cases = [
        (cut, ResponseCode::FormErr),
        (none.to_vec().unwrap(), ResponseCode::FormErr),
        (two.to_vec().unwrap(), ResponseCode::FormErr),
        (update.to_vec().unwrap(), ResponseCode::NotImp),
        (query(RecordType::AXFR, None).to_vec().unwrap(), ResponseCode::NotImp),
    ];
    for (bytes, expected) in cases {
        let (answer, code) = rejected(bytes);
        assert_eq!(code, expected);
        assert_eq!(answer.metadata.id, ID);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        assert_eq!(answer.metadata.response_code, expected);
    }
}

#[test]
fn failures_repeat_the_question() {
    for payload in [None, Some(4096)] {
        let message = query(RecordType::A, payload);
        let failure = Message::from_vec(&question(&message).failure(ResponseCode::ServFail)).unwrap();
        assert_eq!(failure.queries, message.queries);
        assert_eq!(failure.edns.is_some(), payload.is_some());
        assert!(failure.metadata.recursion_desired && failure.metadata.recursion_available);
    }
}

#[test]
fn only_answers_to_the_question_count() {
    let message = query(RecordType::A, None);
    let question = question(&message);
    let taken = |answer: &Message| question.answered_by(answer.to_vec().unwrap()).is_some();
    let right = answer(&message, 10);
    assert!(taken(&right));
    let mut other_id = right.clone();
    other_id.metadata.id = ID + 1;
    assert!(!taken(&other_id));
    assert!(!taken(&message), "the question itself");
    assert!(!taken(&answer(&query(RecordType::AAAA, None), 10)), "another question");
    let mut bare = Message::error_msg(ID, OpCode::Query, ResponseCode::FormErr);
    assert!(taken(&bare), "servers that understand nothing repeat nothing");
    bare.metadata.response_code = ResponseCode::NoError;
    assert!(!taken(&bare));
    let mut upper = right;
    upper.queries[0].set_name(Name::from_ascii("WWW.EXAMPLE.TEST.").unwrap());
    assert!(taken(&upper), "names are the same in any case");
}

#[test]
fn answers_that_are_too_long_lose_their_records() {
    for (payload, length, fits) in
        [(None, 400, true), (None, 600, false), (Some(1232), 600, true), (Some(1232), 2000, false)]
    {
        let message = query(RecordType::TXT, payload);
        let question = question(&message);
        let long = answer(&message, length).to_vec().unwrap();
        let fitted = question.fit(long.clone());
        let read = Message::from_vec(&fitted).unwrap();
        assert_eq!(read.metadata.truncation, !fits, "{payload:?} {length}");
        assert_eq!(read.queries, message.queries);
        assert_eq!(fitted == long, fits);
        assert!(fitted.len() <= usize::from(question.limit));
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let message = question(&query(RecordType::A, None));
        let _ = message.answered_by(bytes.clone());
        let _ = message.fit(bytes.clone());
        if let Received::Question(question) = receive(bytes) {
            let _ = (question.name(), question.kind(), question.failure(ResponseCode::ServFail));
        }
    }

    #[test]
    fn no_change_of_a_question_makes_it_panic(
        payload in proptest::option::of(any::<u16>()),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<proptest::sample::Index>(),
    ) {
        let mut bytes = query(RecordType::HTTPS, payload).to_vec().unwrap();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        bytes.truncate(cut.index(bytes.len() + 1));
        match receive(bytes.clone()) {
            Received::Question(question) => {
                let _ = question.name();
                prop_assert!(Message::from_vec(&question.failure(ResponseCode::ServFail)).is_ok());
                let _ = question.answered_by(bytes);
            }
            Received::Rejected { answer, .. } => prop_assert!(Message::from_vec(&answer).is_ok()),
            Received::Unanswerable => {}
        }
    }
}
