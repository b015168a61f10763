//! An API server for tests: lists, watches, patches, and faults of all of them.

#![expect(clippy::unwrap_used, reason = "for tests alone, which fail where it panics")]

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A fault in place of an answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// A response with this status.
    Status(u16),
    /// A response with this status and a Retry-After header, in seconds.
    RetryAfter(u16, u64),
    /// The headers arrive, the body does not.
    Stall,
    /// Truncated JSON.
    Malformed,
    /// The connection ends without an answer.
    HangUp,
}

/// The server's objects, and a record of requests.
#[derive(Debug, Default)]
pub struct World {
    version: u64,
    /// By path.
    objects: BTreeMap<String, Value>,
    /// Version, path of the collection, kind of change, object.
    history: Vec<(u64, String, &'static str, Value)>,
    /// The oldest version from which a watch can start.
    oldest: u64,
    /// How often watches were cut.
    cuts: u64,
    away: bool,
    bookmarks: u64,
    /// Whether it lacks streaming lists.
    lists_only: bool,
    faults: Vec<(String, Fault)>,
    /// Method, and path with query.
    pub requests: Vec<(String, String)>,
    /// The number of requests of each kind, see [`kind`].
    kinds: BTreeMap<String, usize>,
    /// The Accept headers of the requests.
    pub accepted: Vec<String>,
    /// The created events, in order.
    pub events: Vec<Value>,
}

const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
const DAEMONSETS: &str = "/daemonsets";

/// A running server. Dropping it stops the server.
#[derive(Debug)]
pub struct ApiServer {
    /// The address on which it listens.
    pub address: SocketAddr,
    world: Arc<Mutex<World>>,
    changed: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
        self.cut_watches();
    }
}

impl ApiServer {
    /// Starts one on loopback.
    pub async fn start() -> Self {
        Self::serve(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    /// Serves on the caller's listener, in the current runtime.
    #[must_use]
    pub fn serve(listener: TcpListener) -> Self {
        let address = listener.local_addr().unwrap();
        let world: Arc<Mutex<World>> = Arc::new(Mutex::new(World { version: 10, ..World::default() }));
        let changed = watch::Sender::new(());
        let (shared, changes) = (Arc::clone(&world), changed.clone());
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let connection = Connection {
                    world: Arc::clone(&shared),
                    changes: changes.subscribe(),
                    changed: changes.clone(),
                };
                tokio::spawn(async move {
                    let _ = connection.serve(stream).await;
                });
            }
        });
        Self { address, world, changed, task }
    }

    /// Locks the state; no request is answered meanwhile.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut World)) {
        change(&mut self.world());
        self.changed.send_replace(());
    }

    /// Creates or replaces a namespace.
    pub fn put_namespace(&self, name: &str, labels: Value) {
        let object = json!({
            "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
            "metadata": {"name": name, "labels": labels},
        });
        self.change(|world| world.put(&format!("{NAMESPACES}/{name}"), object));
    }

    /// Creates a DaemonSet, or marks it as deleted while its pods still run.
    pub fn put_daemonset(&self, namespace: &str, name: &str, deleted: bool) {
        let mut object = json!({
            "apiVersion": "apps/v1", "kind": "DaemonSet",
            "metadata": {"name": name, "namespace": namespace},
        });
        if deleted {
            object["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        self.change(|world| world.put(&daemonset_path(namespace, name), object));
    }

    /// Deletes a DaemonSet.
    pub fn delete_daemonset(&self, namespace: &str, name: &str) {
        self.change(|world| world.delete(&daemonset_path(namespace, name)));
    }

    /// Creates or replaces a pod.
    pub fn put_pod(&self, pod: Value) {
        let path = pod_path(&pod);
        self.change(|world| world.put(&path, pod));
    }

    /// Changes an existing pod by a merge patch.
    pub fn patch_pod(&self, namespace: &str, name: &str, patch: &Value) {
        let path = format!("{NAMESPACES}/{namespace}/pods/{name}");
        self.change(|world| {
            let mut pod = world.objects.get(&path).unwrap().clone();
            merge(&mut pod, patch);
            world.put(&path, pod);
        });
    }

    /// Deletes a pod if it exists.
    pub fn delete_pod(&self, namespace: &str, name: &str) {
        let path = format!("{NAMESPACES}/{namespace}/pods/{name}");
        self.change(|world| world.delete(&path));
    }

    /// The value of the annotation that the agent writes.
    #[must_use]
    pub fn redirection(&self, namespace: &str, name: &str) -> Option<String> {
        let world = self.world();
        let pod = world.objects.get(&format!("{NAMESPACES}/{namespace}/pods/{name}"))?;
        Some(pod["metadata"]["annotations"]["ambient.istio.io/redirection"].as_str()?.to_owned())
    }

    /// Makes the next request fail whose kind, method and path (`list pods: GET /api/v1/pods?`) contain this
    /// text.
    pub fn fail_next(&self, what: &str, fault: Fault) {
        self.world().faults.push((what.into(), fault));
    }

    /// The number of faults that have not occurred yet.
    #[must_use]
    pub fn faults_left(&self) -> usize {
        self.world().faults.len()
    }

    /// Removes the faults that have not occurred.
    pub fn clear_faults(&self) {
        self.world().faults.clear();
    }

    /// The number of requests of each kind (`list pods`, `patch pod`) so far.
    #[must_use]
    pub fn kinds(&self) -> BTreeMap<String, usize> {
        self.world().kinds.clone()
    }

    /// Ends all watches and stalled responses.
    pub fn cut_watches(&self) {
        self.change(|world| world.cuts += 1);
    }

    /// Drops the history, so that watches have to start over (410 Gone).
    pub fn compact(&self) {
        self.change(|world| world.oldest = world.version);
    }

    /// Advances the version without changes to the watched objects, and sends bookmarks to watches.
    pub fn bookmark(&self) {
        self.change(|world| {
            world.version += 100;
            world.bookmarks += 1;
        });
    }

    /// Makes the server unreachable, or reachable again.
    pub fn set_away(&self, away: bool) {
        self.change(|world| {
            world.away = away;
            world.cuts += 1;
        });
    }

    /// Makes it refuse streaming lists, as older API servers do.
    pub fn set_lists_only(&self) {
        self.world().lists_only = true;
    }

    /// How often pods were listed, streaming or not.
    #[must_use]
    pub fn lists_of_pods(&self) -> usize {
        let world = self.world();
        let lists = |path: &str| {
            path.starts_with("/api/v1/pods?")
                && (!path.contains("watch=true") || path.contains("sendInitialEvents=true"))
        };
        world.requests.iter().filter(|(_, path)| lists(path)).count()
    }

    /// The number of requests for metadata only.
    #[must_use]
    pub fn requests_for_metadata(&self) -> usize {
        self.world().accepted.iter().filter(|accept| accept.contains("as=partialobjectmetadata")).count()
    }

    /// The number of requests with this text in method, path and query.
    #[must_use]
    pub fn count(&self, what: &str) -> usize {
        self.world()
            .requests
            .iter()
            .filter(|(method, path)| format!("{method} {path}").contains(what))
            .count()
    }
}

fn daemonset_path(namespace: &str, name: &str) -> String {
    format!("/apis/apps/v1/namespaces/{namespace}{DAEMONSETS}/{name}")
}

fn pod_path(pod: &Value) -> String {
    let text = |field: &str| pod["metadata"][field].as_str().unwrap().to_owned();
    format!("{NAMESPACES}/{}/pods/{}", text("namespace"), text("name"))
}

impl World {
    fn put(&mut self, path: &str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        let kind = if self.objects.contains_key(path) { "MODIFIED" } else { "ADDED" };
        self.objects.insert(path.into(), object.clone());
        self.history.push((self.version, collection(path).into(), kind, object));
    }

    fn delete(&mut self, path: &str) {
        if let Some(mut object) = self.objects.remove(path) {
            self.version += 1;
            object["metadata"]["resourceVersion"] = json!(self.version.to_string());
            self.history.push((self.version, collection(path).into(), "DELETED", object));
        }
    }

    fn list(&self, list: &str, node: Option<&str>) -> Vec<Value> {
        let listed = |(key, object): &(&String, &Value)| collection(key) == list && on_node(object, node);
        self.objects.iter().filter(listed).map(|(_, object)| object.clone()).collect()
    }

    fn take_fault(&mut self, request: &str) -> Option<Fault> {
        let position = self.faults.iter().position(|(what, _)| request.contains(what.as_str()))?;
        Some(self.faults.remove(position).1)
    }
}

/// RFC 7386.
fn merge(object: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *object = patch.clone();
        return;
    };
    if !object.is_object() {
        *object = json!({});
    }
    let fields = object.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            fields.remove(key);
        } else {
            merge(fields.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// Verb and resource of a request.
fn kind(request: &Request) -> String {
    let Request { method, path, query, .. } = request;
    let is_collection = |words: &[&str]| matches!(words, [] | ["namespaces", _]);
    let words: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    // /api/v1/…, or /apis/GROUP/VERSION/….
    let version = if words.first() == Some(&"apis") { 2 } else { 1 };
    let words = words.get(version + 1..).unwrap_or_default();
    let (of, is_one) = match words {
        [before @ .., plural] if is_collection(before) => (*plural, false),
        [before @ .., plural, _] | [before @ .., plural, _, "status"] if is_collection(before) => {
            (*plural, true)
        }
        _ => (path.as_str(), false),
    };
    let verb = match method.as_str() {
        "GET" if is_one => "get",
        "GET" if query.contains("watch=true") => "watch",
        "GET" => "list",
        "POST" => "create",
        "PATCH" => "patch",
        other => other,
    };
    format!("{verb} {of}")
}

struct Connection {
    world: Arc<Mutex<World>>,
    changes: watch::Receiver<()>,
    changed: watch::Sender<()>,
}

struct Request {
    method: String,
    path: String,
    query: String,
    accept: String,
    body: Value,
}

impl Connection {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    async fn serve(mut self, stream: TcpStream) -> io::Result<()> {
        let mut stream = BufReader::new(stream);
        while let Some(request) = read(&mut stream).await? {
            let Request { method, path, query, .. } = &request;
            let kind = kind(&request);
            let (fault, away, cuts) = {
                let mut world = self.world();
                world.requests.push((method.clone(), format!("{path}?{query}")));
                world.accepted.push(request.accept.clone());
                *world.kinds.entry(kind.clone()).or_default() += 1;
                (world.take_fault(&format!("{kind}: {method} {path}?{query}")), world.away, world.cuts)
            };
            if away {
                return Ok(());
            }
            match fault {
                None if query.contains("sendInitialEvents=true") && self.world().lists_only => {
                    respond(&mut stream, 422, None, &failure(422).to_string()).await?;
                }
                None if query.contains("watch=true") => return self.watch(&mut stream, &request).await,
                None => {
                    let (status, body) = self.answer(request);
                    respond(&mut stream, status, None, &body.to_string()).await?;
                }
                Some(Fault::Status(status)) => {
                    respond(&mut stream, status, None, &failure(status).to_string()).await?;
                }
                Some(Fault::RetryAfter(status, seconds)) => {
                    respond(&mut stream, status, Some(seconds), "Too many requests").await?;
                }
                Some(Fault::Malformed) => {
                    respond(&mut stream, 200, None, "{\"kind\": \"PodList\", \"items\": [{]").await?;
                }
                Some(Fault::Stall) => {
                    stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await?;
                    let cut =
                        async { while self.world().cuts == cuts && self.changes.changed().await.is_ok() {} };
                    let _ = tokio::time::timeout(Duration::from_secs(60), cut).await;
                    return Ok(());
                }
                Some(Fault::HangUp) => return Ok(()),
            }
        }
        Ok(())
    }

    fn answer(&self, request: Request) -> (u16, Value) {
        let Request { method, path, query, mut body, .. } = request;
        let mut world = self.world();
        match (method.as_str(), path.as_str()) {
            ("GET", list) if matches!(list, PODS | NAMESPACES) || list.ends_with(DAEMONSETS) => {
                let items = world.list(list, node(&query).as_deref());
                let metadata = json!({"resourceVersion": world.version.to_string()});
                (200, json!({"apiVersion": "v1", "kind": "List", "metadata": metadata, "items": items}))
            }
            ("GET", key) => match world.objects.get(key) {
                Some(object) => (200, object.clone()),
                None => (404, failure(404)),
            },
            ("POST", events) if events.ends_with("/events") => {
                // Unlike a name, `generateName` may end with a dash, but must be valid otherwise.
                let stem = body["metadata"]["generateName"].as_str().unwrap_or_default();
                if !stem.trim_end_matches('-').ends_with(|c: char| c.is_ascii_alphanumeric()) {
                    return (422, failure(422));
                }
                body["metadata"]["name"] = format!("{stem}{}", world.events.len()).into();
                world.events.push(body.clone());
                (201, body)
            }
            ("PATCH", key) if key.contains("/events/") => {
                let name = key.rsplit('/').next().unwrap();
                match world.events.iter_mut().find(|event| event["metadata"]["name"] == name) {
                    Some(event) => {
                        merge(event, &body);
                        (200, event.clone())
                    }
                    None => (404, failure(404)),
                }
            }
            ("PATCH", status) => {
                let key = status.trim_end_matches("/status");
                let Some(mut object) = world.objects.get(key).cloned() else { return (404, failure(404)) };
                let uid = &body["metadata"]["uid"];
                if !uid.is_null() && *uid != object["metadata"]["uid"] {
                    return (409, failure(409));
                }
                merge(&mut object, &body);
                world.put(key, object.clone());
                drop(world);
                self.changed.send_replace(());
                (200, object)
            }
            _ => (405, failure(405)),
        }
    }

    async fn watch(&mut self, stream: &mut BufReader<TcpStream>, request: &Request) -> io::Result<()> {
        let node = node(&request.query);
        let (mut seen, mut listed) = if request.query.contains("sendInitialEvents=true") {
            // Without a version, the list is as recent as the request.
            assert_eq!(parameter(&request.query, "resourceVersion").unwrap_or_default(), "");
            let world = self.world();
            let line = |object| json!({"type": "ADDED", "object": object});
            let mut listed: Vec<Value> =
                world.list(&request.path, node.as_deref()).into_iter().map(line).collect();
            listed.push(bookmark(world.version, &json!({"k8s.io/initial-events-end": "true"})));
            (world.version, listed)
        } else {
            (parameter(&request.query, "resourceVersion").unwrap().parse().unwrap(), Vec::new())
        };
        stream
            .write_all(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
            )
            .await?;
        let (cuts, mut bookmarks) = {
            let world = self.world();
            (world.cuts, world.bookmarks)
        };
        loop {
            self.changes.borrow_and_update();
            let mut lines = std::mem::take(&mut listed);
            let cut = {
                let world = self.world();
                if seen < world.oldest {
                    lines.push(json!({"type": "ERROR", "object": failure(410)}));
                } else {
                    for (version, collection, kind, object) in &world.history {
                        if *version > seen && *collection == request.path && on_node(object, node.as_deref())
                        {
                            lines.push(json!({"type": kind, "object": object}));
                        }
                    }
                    seen = world.version;
                    if world.bookmarks != bookmarks {
                        bookmarks = world.bookmarks;
                        lines.push(bookmark(seen, &json!({})));
                    }
                }
                world.cuts != cuts
            };
            if cut {
                return Ok(());
            }
            for line in &lines {
                let line = format!("{line}\n");
                stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes()).await?;
            }
            stream.flush().await?;
            if self.changes.changed().await.is_err() {
                return Ok(());
            }
        }
    }
}

fn bookmark(version: u64, annotations: &Value) -> Value {
    let metadata = json!({"resourceVersion": version.to_string(), "annotations": annotations});
    json!({"type": "BOOKMARK", "object": {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}})
}

fn collection(key: &str) -> &str {
    match key.rsplit_once('/') {
        Some((daemonsets, _)) if daemonsets.ends_with(DAEMONSETS) => daemonsets,
        Some((pods, _)) if pods.ends_with("/pods") => PODS,
        _ => NAMESPACES,
    }
}

fn parameter(query: &str, name: &str) -> Option<String> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=').map(str::to_owned))
}

fn node(query: &str) -> Option<String> {
    let selector = parameter(query, "fieldSelector")?;
    // There is only one.
    if selector.starts_with("metadata.name%3D") {
        return None;
    }
    Some(selector.strip_prefix("spec.nodeName%3D").expect("the node's pods only").to_owned())
}

fn on_node(object: &Value, node: Option<&str>) -> bool {
    node.is_none_or(|node| object["spec"]["nodeName"] == node)
}

fn failure(status: u16) -> Value {
    let message = format!("failure {status} of a test");
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "reason": "", "code": status})
}

async fn read(stream: &mut BufReader<TcpStream>) -> io::Result<Option<Request>> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
    let (mut length, mut accept) = (0, String::new());
    loop {
        line.clear();
        stream.read_line(&mut line).await?;
        let header = line.trim_end().to_ascii_lowercase();
        if let Some(value) = header.strip_prefix("accept:") {
            accept = value.trim().into();
        }
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    let query = query.trim_start_matches('&').into();
    Ok(Some(Request { method, path: path.into(), query, accept, body }))
}

async fn respond(
    stream: &mut BufReader<TcpStream>,
    status: u16,
    retry_after: Option<u64>,
    body: &str,
) -> io::Result<()> {
    let retry = retry_after.map(|seconds| format!("Retry-After: {seconds}\r\n")).unwrap_or_default();
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status} Text\r\nContent-Type: application/json\r\n{retry}Content-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    stream.flush().await
}
