/*
 * A PKCS#11 module that misbehaves on demand, round the real SoftHSM.
 *
 * Every function is SoftHSM's, but for the few below. Each of those first writes its name to $HOSTILE_DIR/log, then
 * looks for a file of its name in that directory: NAME.once (which it removes: only one call sees it) or NAME. The
 * file's text says what the call does instead:
 *
 *   hang | abort | segfault | exit | kill     the process does that
 *   sleep N                                   waits N milliseconds, then goes on as usual
 *   ckr 0xN                                   returns that value
 *   garbage                                   C_Sign: returns CKR_OK and a signature of 0x5a bytes
 *   absent                                    C_GetSlotList: there is no slot with a token
 *   flags 0xN                                 C_GetTokenInfo: those flags are set besides its own
 */
#define CRYPTOKI_EXPORTS
#include <p11-kit/pkcs11.h>

#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static CK_FUNCTION_LIST real;
static CK_FUNCTION_LIST hostile;

/* 1 and the text where the file is there; a .once file is gone afterwards */
static int told(const char *name, const char *suffix, char *text, size_t size)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s%s", getenv("HOSTILE_DIR"), name, suffix);
    int file = open(path, O_RDONLY);
    if (file < 0)
        return 0;
    ssize_t length = read(file, text, size - 1);
    close(file);
    text[length > 0 ? length : 0] = 0;
    return *suffix == 0 || unlink(path) == 0;
}

static void log_call(const char *name)
{
    char path[512], line[64];
    snprintf(path, sizeof path, "%s/log", getenv("HOSTILE_DIR"));
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    int length = snprintf(line, sizeof line, "%s\n", name);
    if (file >= 0 && write(file, line, length) != length)
        abort();
    close(file);
}

/* 1 where the call is to return *rv at once; text holds what else it was told */
static int misbehave(const char *name, CK_RV *rv, char *text, size_t size)
{
    log_call(name);
    if (!told(name, ".once", text, size) && !told(name, "", text, size)) {
        *text = 0;
        return 0;
    }
    if (!strncmp(text, "hang", 4))
        for (;;)
            pause();
    if (!strncmp(text, "abort", 5))
        abort();
    if (!strncmp(text, "segfault", 8)) {
        signal(SIGSEGV, SIG_DFL);
        *(volatile int *)8 = 1;
    }
    if (!strncmp(text, "exit", 4))
        _exit(3);
    if (!strncmp(text, "kill", 4))
        raise(SIGKILL);
    if (!strncmp(text, "sleep ", 6))
        usleep(1000 * strtoul(text + 6, NULL, 0));
    if (!strncmp(text, "ckr ", 4)) {
        *rv = strtoul(text + 4, NULL, 0);
        return 1;
    }
    return 0;
}

#define ENTER(name)                                      \
    char text[128];                                      \
    CK_RV rv;                                            \
    if (misbehave(#name, &rv, text, sizeof text))        \
        return rv

static CK_RV initialize(void *arguments)
{
    ENTER(C_Initialize);
    return real.C_Initialize(arguments);
}

static CK_RV get_slot_list(unsigned char present, CK_SLOT_ID *slots, unsigned long *count)
{
    ENTER(C_GetSlotList);
    if (!strncmp(text, "absent", 6)) {
        *count = 0;
        return CKR_OK;
    }
    return real.C_GetSlotList(present, slots, count);
}

static CK_RV get_token_info(CK_SLOT_ID slot, CK_TOKEN_INFO *info)
{
    ENTER(C_GetTokenInfo);
    rv = real.C_GetTokenInfo(slot, info);
    if (!strncmp(text, "flags ", 6))
        info->flags |= strtoul(text + 6, NULL, 0);
    return rv;
}

static CK_RV open_session(CK_SLOT_ID slot, CK_FLAGS flags, void *application, CK_NOTIFY notify, CK_SESSION_HANDLE *session)
{
    ENTER(C_OpenSession);
    return real.C_OpenSession(slot, flags, application, notify, session);
}

static CK_RV login(CK_SESSION_HANDLE session, CK_USER_TYPE user, unsigned char *pin, unsigned long length)
{
    ENTER(C_Login);
    return real.C_Login(session, user, pin, length);
}

static CK_RV find_objects_init(CK_SESSION_HANDLE session, CK_ATTRIBUTE *template, unsigned long count)
{
    ENTER(C_FindObjectsInit);
    return real.C_FindObjectsInit(session, template, count);
}

static CK_RV sign_init(CK_SESSION_HANDLE session, CK_MECHANISM *mechanism, CK_OBJECT_HANDLE key)
{
    ENTER(C_SignInit);
    return real.C_SignInit(session, mechanism, key);
}

static CK_RV sign(CK_SESSION_HANDLE session, unsigned char *data, unsigned long length, unsigned char *signature,
                  unsigned long *signature_length)
{
    if (!signature) /* only the length is asked for */
        return real.C_Sign(session, data, length, signature, signature_length);
    char text[128];
    CK_RV rv;
    int refused = misbehave("C_Sign", &rv, text, sizeof text);
    CK_RV result = real.C_Sign(session, data, length, signature, signature_length);
    if (refused)
        return rv; /* an error ends the operation: that is why SoftHSM was asked all the same */
    if (!strncmp(text, "garbage", 7))
        memset(signature, 0x5a, *signature_length);
    return result;
}

CK_RV C_GetFunctionList(CK_FUNCTION_LIST **list)
{
    void *library = dlopen(getenv("HOSTILE_MODULE"), RTLD_NOW | RTLD_LOCAL);
    CK_RV (*get)(CK_FUNCTION_LIST **) = library ? dlsym(library, "C_GetFunctionList") : NULL;
    CK_FUNCTION_LIST *found;
    if (!get || get(&found) != CKR_OK)
        return CKR_GENERAL_ERROR;
    real = hostile = *found;
    hostile.C_Initialize = initialize;
    hostile.C_GetSlotList = get_slot_list;
    hostile.C_GetTokenInfo = get_token_info;
    hostile.C_OpenSession = open_session;
    hostile.C_Login = login;
    hostile.C_FindObjectsInit = find_objects_init;
    hostile.C_SignInit = sign_init;
    hostile.C_Sign = sign;
    *list = &hostile;
    return CKR_OK;
}
