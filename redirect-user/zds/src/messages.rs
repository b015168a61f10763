//! The protobuf messages of `istio.workload.zds`.

/// First message of a proxy.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Hello {
    /// Protocol version, see [`Version`].
    #[prost(enumeration = "Version", tag = "1")]
    pub version: i32,
}

/// Versions of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Version {
    /// No version was set.
    NotUsed = 0,
    /// The only version so far.
    V1 = 1,
}

/// A request of the agent to a proxy.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkloadRequest {
    /// The request.
    #[prost(oneof = "Request", tags = "1, 2, 3, 5")]
    pub payload: Option<Request>,
}

/// The kinds of [`WorkloadRequest`].
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Request {
    /// Serve this pod. The packet carries exactly one file descriptor: the pod's network namespace.
    #[prost(message, tag = "1")]
    Add(AddWorkload),
    /// Stop serving this pod, cut its connections.
    #[prost(message, tag = "2")]
    Del(DelWorkload),
    /// All pods that were known when the connection began have been sent.
    #[prost(message, tag = "3")]
    SnapshotSent(SnapshotSent),
    /// The pod still exists, but the agent does not have its namespace yet: keep serving it if it is already
    /// served.
    #[prost(message, tag = "5")]
    Keep(KeepWorkload),
}

/// See [`Request::Add`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct AddWorkload {
    /// The pod's UID.
    #[prost(string, tag = "1")]
    pub uid: String,
    /// The pod's identity. ztunnel exits without it.
    #[prost(message, optional, tag = "2")]
    pub workload_info: Option<WorkloadInfo>,
}

/// The identity of a pod.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct WorkloadInfo {
    /// The pod's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The pod's Kubernetes namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// The pod's service account.
    #[prost(string, tag = "3")]
    pub service_account: String,
}

/// See [`Request::Del`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct DelWorkload {
    /// The pod's UID.
    #[prost(string, tag = "2")]
    pub uid: String,
}

/// See [`Request::SnapshotSent`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotSent {}

/// See [`Request::Keep`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct KeepWorkload {
    /// The pod's UID.
    #[prost(string, tag = "1")]
    pub uid: String,
}

/// The proxy's answer to one request.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WorkloadResponse {
    /// The answer.
    #[prost(oneof = "Response", tags = "1")]
    pub payload: Option<Response>,
}

/// The kinds of [`WorkloadResponse`].
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Response {
    /// The request succeeded or failed.
    #[prost(message, tag = "1")]
    Ack(Ack),
}

/// See [`Response::Ack`].
#[derive(Clone, PartialEq, prost::Message)]
pub struct Ack {
    /// Empty on success; otherwise the error (a "nack").
    #[prost(string, tag = "1")]
    pub error: String,
}
