/* What the server calls of uWebSockets, its C interface, socketify's additions and libuv, and no
   more: cffi makes Python functions of it, by tests/native_types.py.

   The first parameter of most says whether a socket speaks TLS; enumerations that Python has its
   own names for are integers. */

/* Handles: only the library looks into them. */
struct us_loop_t;
struct us_listen_socket_t;
struct us_socket_context_t;
typedef struct uws_app_s uws_app_t;
typedef struct uws_req_s uws_req_t;
typedef struct uws_res_s uws_res_t;
typedef struct uws_socket_context_s uws_socket_context_t;
typedef struct uws_websocket_s uws_websocket_t;
typedef struct socketify_loop socketify_loop;

typedef unsigned int uws_opcode_t;
typedef enum { SOCKETIFY_RUN_DEFAULT, SOCKETIFY_RUN_ONCE, SOCKETIFY_RUN_NOWAIT } socketify_run_mode;

/* The loop. */
socketify_loop *socketify_create_loop();
void socketify_destroy_loop(socketify_loop *);
void *socketify_get_native_loop(socketify_loop *);
int socketify_loop_run(socketify_loop *, socketify_run_mode);
struct us_loop_t *uws_get_loop_with_native(void *);
void us_loop_free(struct us_loop_t *);
void us_wakeup_loop(struct us_loop_t *);
void uv_walk(void *, void (*)(void *, void *), void *);
void uv_close(void *, void *);
int uv_is_closing(void *);

/* Where it listens. */
struct us_socket_context_options_t {
    const char *key_file_name, *cert_file_name, *passphrase, *dh_params_file_name;
    const char *ca_file_name, *ssl_ciphers;
    int ssl_prefer_low_memory_usage;
};
typedef struct {
    int port;
    const char *host;
    int options;
} uws_app_listen_config_t;
uws_app_t *uws_create_app(int, struct us_socket_context_options_t);
void uws_app_destroy(int, uws_app_t *);
bool uws_constructor_failed(int, uws_app_t *);
void uws_app_listen_with_config(int, uws_app_t *, uws_app_listen_config_t,
    void (*)(struct us_listen_socket_t *, uws_app_listen_config_t, void *), void *);
void uws_app_listen_domain_with_options(int, uws_app_t *, const char *, size_t, int,
    void (*)(struct us_listen_socket_t *, const char *, size_t, int, void *), void *);
void us_listen_socket_close(int, struct us_listen_socket_t *);
int us_socket_local_port(int, struct us_listen_socket_t *);
void uws_filter(int, uws_app_t *, void (*)(uws_res_t *, int, void *), void *);

/* Sockets. */
struct us_socket_context_t *us_socket_context(int, void *);
void us_socket_context_close(int, struct us_socket_context_t *);
void us_socket_timeout(int, void *, unsigned int);
int us_poll_fd(void *);
void us_poll_change(void *, void *, int);

/* HTTP. */
typedef struct {
    bool ok, has_responded;
} uws_try_end_result_t;
void uws_app_any(int, uws_app_t *, const char *, void (*)(uws_res_t *, uws_req_t *, void *),
    void *);
size_t uws_req_get_full_url(uws_req_t *, const char **);
size_t uws_req_get_method(uws_req_t *, const char **);
size_t uws_req_get_header(uws_req_t *, const char *, size_t, const char **);
void uws_req_for_each_header(uws_req_t *,
    void (*)(const char *, size_t, const char *, size_t, void *), void *);
size_t uws_res_get_remote_address_as_text(int, uws_res_t *, const char **);
uintmax_t uws_res_get_write_offset(int, uws_res_t *);
void uws_res_write_status(int, uws_res_t *, const char *, size_t);
void uws_res_write_header(int, uws_res_t *, const char *, size_t, const char *, size_t);
bool uws_res_write(int, uws_res_t *, const char *, size_t);
void uws_res_end(int, uws_res_t *, const char *, size_t, bool);
void uws_res_end_without_body(int, uws_res_t *, bool);
uws_try_end_result_t uws_res_try_end(int, uws_res_t *, const char *, size_t, uintmax_t, bool);
void uws_res_cork(int, uws_res_t *, void (*)(uws_res_t *, void *), void *);
void uws_res_pause(int, uws_res_t *);
void uws_res_close(int, uws_res_t *);
void uws_res_on_aborted(int, uws_res_t *, void (*)(uws_res_t *, void *), void *);
void uws_res_on_data(int, uws_res_t *, void (*)(uws_res_t *, const char *, size_t, bool, void *),
    void *);
void uws_res_on_writable(int, uws_res_t *, bool (*)(uws_res_t *, uintmax_t, void *), void *);
void uws_res_upgrade(int, uws_res_t *, void *, const char *, size_t, const char *, size_t,
    const char *, size_t, uws_socket_context_t *);

/* WebSockets. */
typedef struct {
    unsigned int compression;
    unsigned int maxPayloadLength;
    unsigned short idleTimeout;
    unsigned int maxBackpressure;
    bool closeOnBackpressureLimit, resetIdleTimeoutOnSend, sendPingsAutomatically;
    unsigned short maxLifetime;
    void (*upgrade)(uws_res_t *, uws_req_t *, uws_socket_context_t *, void *);
    void (*open)(uws_websocket_t *, void *);
    void (*message)(uws_websocket_t *, const char *, size_t, uws_opcode_t, void *);
    void (*drain)(uws_websocket_t *, void *);
    void (*ping)(uws_websocket_t *, const char *, size_t, void *);
    void (*pong)(uws_websocket_t *, const char *, size_t, void *);
    void (*close)(uws_websocket_t *, int, const char *, size_t, void *);
    void (*subscription)(uws_websocket_t *, const char *, size_t, int, int, void *);
} uws_socket_behavior_t;
void uws_ws(int, uws_app_t *, const char *, uws_socket_behavior_t, void *);
unsigned int uws_ws_send_with_options(int, uws_websocket_t *, const char *, size_t, uws_opcode_t,
    bool, bool);
int uws_ws_get_buffered_amount(int, uws_websocket_t *);
void *uws_ws_get_user_data(int, uws_websocket_t *);
void uws_ws_cork(int, uws_websocket_t *, void (*)(void *), void *);
void uws_ws_end(int, uws_websocket_t *, int, const char *, size_t);
void uws_ws_close(int, uws_websocket_t *);
bool uws_ws_subscribe(int, uws_websocket_t *, const char *, size_t);
bool uws_ws_unsubscribe(int, uws_websocket_t *, const char *, size_t);
bool uws_publish(int, uws_app_t *, const char *, size_t, const char *, size_t, uws_opcode_t, bool);
